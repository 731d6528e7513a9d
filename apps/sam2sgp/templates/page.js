// Buttons send one decision and load the page again; what went wrong is said in the page.
"use strict";

const message = document.getElementById("message");

/** What a button asks for, while it is disabled; what went wrong is said, and it can be pressed again. */
async function send(button, path, body, done) {
  button.disabled = true;
  message.className = "";
  try {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    const { detail } = await answer.json().catch(() => ({ detail: answer.statusText }));
    if (!answer.ok) throw new Error(detail);
    done();
  } catch (error) {
    message.className = "error";
    message.textContent = error.message;
    button.disabled = false;
    button.focus();
  }
}

function decide(button) {
  const { action, image, labelTag, seen } = button.dataset;
  message.textContent = `${button.textContent} ${image} …`;
  send(button, action, { image, label_tag: labelTag, ...(seen && { seen }) }, () => location.reload());
}

function train(button) {
  send(button, `../train/${button.dataset.train}`, {}, () => {
    message.textContent = "It has begun, and takes a minute. Load this page again then: Training says what came of it.";
    message.scrollIntoView();
  });
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action], button[data-train]");
  if (button) (button.dataset.train ? train : decide)(button);
});
