// A scene that is dropped on the page as a folder or as its files: they become one upload.

const MOST = 256; // files, as the server takes them

// The files of a folder and of its extra images in 1, 2, ..., each with its path.
export async function filesIn(folder, above = "") {
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

// Files and folders of extra images, that were dropped side by side.
export const together = async (list) =>
  (await Promise.all(list.map((each) => (each.isDirectory ? filesIn(each, `${each.name}/`) : [[each.name, each]])))).flat();

// A first line that says what it is, the paths and sizes of the files, their bytes.
export const packed = (files) =>
  new Blob(["bas scene\n", JSON.stringify(files.map(([path, { size }]) => [path, size])), "\n", ...files.map(([, file]) => file)]);
