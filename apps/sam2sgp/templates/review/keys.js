// Keys and what they do. They are the page's own: in a text field, a list of choices or a dialog they do nothing.

/**
 * `once`: a key that is held does it once.
 * @typedef {{keys: string[], once?: boolean, does: string, run: (event: KeyboardEvent) => void}} Command
 */

const TYPING = "input:not([type=checkbox], [type=radio], [type=range], [type=button]), textarea, select, [contenteditable]";
/** Keys with which these elements do something themselves. */
const OWN = [
  ["input[type=range]", /^(Arrow|Page|Home|End)/],
  ["input[type=radio]", /^(Arrow| )/],
  ["button, a, summary, input[type=checkbox]", /^(Enter| )$/],
  ["[role=listbox]", /^(Arrow|Page|Home|End|Enter)/],
];

/** How a key is called here, such as "Shift+A" or "Ctrl+Z". @param {KeyboardEvent} event */
export function nameOf(event) {
  const digit = /^Digit(\d)$/.exec(event.code ?? "");
  const key = digit ? digit[1] : event.key.length === 1 ? event.key.toUpperCase() : event.key;
  const isLetter = /^[A-Z0-9]$/.test(key);
  return [
    (event.ctrlKey || event.metaKey) && "Ctrl",
    event.altKey && "Alt",
    event.shiftKey && (isLetter || key.length > 1) && "Shift",
    key === " " ? "Space" : key,
  ]
    .filter(Boolean)
    .join("+");
}

/** Whether a key belongs to what has the focus. @param {KeyboardEvent} event */
export function isTaken(event) {
  const target = event.target instanceof Element ? event.target : null;
  if (!target) return false;
  if (target.closest(TYPING) || target.closest("dialog[open]")) return true;
  return OWN.some(([selector, keys]) => target.matches(selector) && keys.test(event.key));
}

/** @param {Command[]} commands */
export function listen(commands) {
  const known = new Map(commands.flatMap((command) => command.keys.map((key) => [key, command])));
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || isTaken(event)) return;
    const command = known.get(nameOf(event));
    if (!command) return;
    event.preventDefault();
    if (!(command.once && event.repeat)) command.run(event);
  });
}

/** The commands as rows of a table. @param {HTMLElement} table @param {Command[]} commands */
export function explain(table, commands) {
  for (const { keys, does } of commands) {
    if (!does) continue;
    const row = document.createElement("tr");
    const [key, meaning] = [document.createElement("th"), document.createElement("td")];
    key.scope = "row";
    keys.forEach((name, number) => {
      if (number) key.append(" ");
      const shown = document.createElement("kbd");
      shown.textContent = name;
      key.append(shown);
    });
    meaning.textContent = does;
    row.append(key, meaning);
    table.append(row);
  }
}
