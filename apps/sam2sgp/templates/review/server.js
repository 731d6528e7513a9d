// Requests to the server: JSON, voxels, decisions. Nothing else of the page talks to it.

/** An answer that was a refusal, or none at all. */
export class Refused extends Error {
  /** @param {number} status 0 where nothing came back. @param {string} message a sentence of the server's. */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * @param {string} path relative to the page.
 * @param {Record<string, string | number>} query
 */
function address(path, query) {
  const text = new URLSearchParams(Object.entries(query).map(([key, value]) => [key, String(value)])).toString();
  return text ? `${path}?${text}` : path;
}

/** @param {string} path @param {RequestInit} [options] */
async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server doesn't answer. Nothing is lost: try again when it does.");
  }
  if (answer.ok) return answer;
  const { detail } = await answer.json().catch(() => ({ detail: answer.statusText }));
  throw new Refused(answer.status, String(detail));
}

/** @param {string} path @param {Record<string, string | number>} [query] */
export async function json(path, query = {}) {
  return (await ask(address(path, query))).json();
}

/** @param {string} path @param {Record<string, string | number>} query @returns {Promise<ArrayBuffer>} */
export async function voxels(path, query) {
  return (await ask(address(path, query))).arrayBuffer();
}

/** @param {string} path @param {object} body */
export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

/** @param {string} path */
export async function remove(path) {
  return (await ask(path, { method: "DELETE" })).json();
}

/** Have an image segmented; the prediction is saved. @param {string} image @param {AbortSignal} signal ends it. */
export async function segment(image, signal) {
  const form = new FormData();
  form.append("params", JSON.stringify({ save_label: true, label_tag: "original" }));
  const path = address("../../infer/sam2sgp", { image, output: "json" });
  return (await ask(path, { method: "POST", body: form, signal })).json();
}
