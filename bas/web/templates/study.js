"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const fields = [...document.querySelectorAll("fieldset")];
const place = "bas-study-" + data.study + "-" + data.page;
let state = {rater: newName(), index: 0, answers: {}};
let shown = "intro", since = 0;

function newName() {
  return [...crypto.getRandomValues(new Uint8Array(8))].map(byte => byte.toString(16).padStart(2, "0")).join("");
}

// Marks survive the closing of the page where the browser keeps them, and a reload in any case.
function keep() {
  history.replaceState(state, "");
  try { localStorage.setItem(place, JSON.stringify(state)); } catch (error) { /* not kept */ }
}
function kept() { try { return JSON.parse(localStorage.getItem(place)); } catch (error) { return null; } }
state = kept() || history.state || state;

function show(name) {
  shown = name;
  for (const id of ["intro", "asking", "end"]) at(id).hidden = id != name;
}

function marks() { return state.answers[data.questions[state.index].id] || {}; }

function ask(index) {
  state.index = index;
  keep();
  show("asking");
  const question = data.questions[index];
  at("number").textContent = (index + 1) + " of " + data.questions.length;
  at("progress").max = data.questions.length;
  at("progress").value = index;
  at("concept").src = question.concept;
  at("image").src = question.image;
  at("word").textContent = question.word;
  at("text").textContent = question.text;
  at("back").disabled = index == 0;
  since = performance.now();
  refresh();
  window.scrollTo(0, 0);
}

function refresh() {
  const given = marks();
  for (const field of fields) {
    const mark = given[field.dataset.question];
    for (const input of field.querySelectorAll("input")) input.checked = Number(input.value) == mark;
  }
  const open = fields.find(field => !given[field.dataset.question]);
  for (const field of fields) field.classList.toggle("now", field == open);
  at("next").disabled = Boolean(open);
}

function give(name, mark) {
  const given = {...marks(), [name]: mark};
  given.seconds = Math.round((given.seconds || 0) * 10 + (performance.now() - since) / 100) / 10;
  since = performance.now();
  state.answers[data.questions[state.index].id] = given;
  keep();
  refresh();
}

function next() {
  if (at("next").disabled) return;
  if (state.index + 1 < data.questions.length) ask(state.index + 1);
  else { at("saved").textContent = ""; show("end"); at("save").focus(); }
}

function back() {
  if (shown == "end") ask(data.questions.length - 1);
  else if (state.index) ask(state.index - 1);
}

function answersFile() {
  return JSON.stringify({study: data.study, page: data.page, rater: state.rater, answers: state.answers}, null, 1);
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([answersFile()], {type: "application/json"}));
  link.download = "answers-" + data.page + "-" + state.rater + ".json";
  link.click();
  at("saved").textContent = "Saved as " + link.download + ".";
}

for (const field of fields) {
  for (let mark = 1; mark <= 5; mark++) {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, {type: "radio", name: field.dataset.question, value: mark});
    input.addEventListener("change", () => give(field.dataset.question, mark));
    label.append(input, String(mark));
    field.querySelector(".marks").append(label);
  }
}
for (const element of document.querySelectorAll(".count")) element.textContent = data.questions.length;
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
at("start").textContent = Object.keys(state.answers).length ? "Go on" : "Start";
at("start").addEventListener("click", () => ask(Math.min(state.index, data.questions.length - 1)));
at("next").addEventListener("click", next);
at("back").addEventListener("click", back);
at("again").addEventListener("click", back);
at("save").addEventListener("click", save);

// A digit marks the first question that has no mark yet, or that the focus is in; then the second one again.
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const onButton = event.target.tagName == "BUTTON";
  if (shown == "intro" && event.key == "Enter" && !onButton) { event.preventDefault(); at("start").click(); return; }
  if (shown != "asking") return;
  if (/^[1-5]$/.test(event.key)) {
    const field = event.target.closest && event.target.closest("fieldset");
    const open = fields.find(one => one.classList.contains("now"));
    give((field || open || fields[1]).dataset.question, Number(event.key));
    if (document.activeElement) document.activeElement.blur();
  } else if (event.key == "Enter" && !onButton) {
    event.preventDefault();
    next();
  } else if (event.key == "ArrowLeft" && !event.target.closest("fieldset")) {
    back();
  }
});
