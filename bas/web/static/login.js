// The page before the studio, on another machine: it asks for the password.
const form = document.getElementById("login"),
  field = document.getElementById("password"),
  said = document.getElementById("said");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  said.textContent = "";
  try {
    const answer = await fetch("/login", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ password: field.value }),
    });
    const { to, message } = await answer.json();
    if (to) location.replace(to + location.hash);
    else said.textContent = message;
  } catch {
    said.textContent = "bas studio does not answer";
  }
  field.select();
});
