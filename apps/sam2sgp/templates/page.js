// Buttons send one decision and load the page again; what went wrong is said in the page.
"use strict";

const message = document.getElementById("message");

async function decide(button) {
  const { action, image, labelTag, seen } = button.dataset;
  button.disabled = true;
  message.className = "";
  message.textContent = `${button.textContent} ${image} …`;
  try {
    const answer = await fetch(action, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ image, label_tag: labelTag, ...(seen && { seen }) }),
    });
    const { detail } = await answer.json().catch(() => ({ detail: answer.statusText }));
    if (!answer.ok) throw new Error(detail);
    location.reload();
  } catch (error) {
    message.className = "error";
    message.textContent = error.message;
    button.disabled = false;
    button.focus();
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (button) decide(button);
});
