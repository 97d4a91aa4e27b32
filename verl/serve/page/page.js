"use strict";

const place = (id) => document.getElementById(id);
let model = null;

async function ask(path, body) {
  const headers = {};
  if (place("key").value) headers.Authorization = `Bearer ${place("key").value}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body)});
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error.message);
  return content;
}

async function findModel() {
  if (model) return;
  model = (await ask("v1/models")).data[0];
  place("model").textContent = model.id;
  place("tokens").max = model.max_new_tokens;
  if (place("tokens").valueAsNumber > model.max_new_tokens) place("tokens").value = model.max_new_tokens;
}

function product(first, second) {
  return first.reduce((sum, value, i) => sum + value * second[i], 0);
}

async function compare() {
  await findModel();
  const think = place("think").checked;
  const asked = {model: model.id, input: [place("first").value, place("second").value], think, return_rationales: true};
  if (think) Object.assign(asked, {max_new_tokens: place("tokens").valueAsNumber, seed: place("seed").valueAsNumber});
  const started = performance.now();
  const {data, usage} = await ask("v1/embeddings", asked);
  const similarity = product(data[0].embedding, data[1].embedding);
  place("similarity").textContent = similarity.toFixed(3);
  place("meter").value = similarity;
  for (const [name, {rationale, shortened}] of [["first", data[0]], ["second", data[1]]]) {
    const cut = shortened ? " (The text was cut to fit.)" : "";
    place(`${name}-rationale`).textContent = (think ? rationale || "The model ended at once." : "Not asked for.") + cut;
  }
  const seconds = ((performance.now() - started) / 1000).toFixed(2);
  place("cost").textContent =
    `${seconds} s, ${usage.prompt_tokens} prompt tokens, ${usage.completion_tokens} tokens of rationales`;
  place("result").hidden = false;
}

async function shown(work) {
  place("compare").disabled = true;
  place("error").hidden = true;
  place("state").textContent = "Waiting for the server";
  try {
    await work();
  } catch (error) {
    place("error").textContent = error.message;
    place("error").hidden = false;
  }
  place("state").textContent = "";
  place("compare").disabled = false;
}

place("form").addEventListener("submit", (event) => {
  event.preventDefault();
  shown(compare);
});
place("think").addEventListener("change", () => {
  for (const id of ["tokens", "seed"]) place(id).disabled = !place("think").checked;
});
// A server with a key is asked once the key is given.
findModel().catch(() => {});
