// The folder of a scene, dropped on the page: its files become one upload.

const MOST = 256; // files, as the server takes them

// The files of a folder and of its extra images in 1, 2, ..., each with its path.
async function filesIn(folder, above = "") {
  const found = [],
    reader = folder.createReader();
  for (;;) {
    const entries = await new Promise((...both) => reader.readEntries(...both));
    if (!entries.length || found.length > MOST) return found;
    for (const entry of entries) {
      if (entry.isFile) found.push([above + entry.name, await new Promise((...both) => entry.file(...both))]);
      else if (!above && /^\d+$/.test(entry.name)) found.push(...(await filesIn(entry, `${entry.name}/`)));
    }
  }
}

// A first line that says what it is, the paths and sizes of the files, their bytes.
export async function packed(folder) {
  const files = await filesIn(folder);
  return new Blob([
    "bas scene\n",
    JSON.stringify(files.map(([path, { size }]) => [path, size])),
    "\n",
    ...files.map(([, file]) => file),
  ]);
}
