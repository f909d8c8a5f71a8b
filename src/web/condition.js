// What the images are to show, for models that can be told: a class by its number, or a prompt.

const place = document.getElementById("condition");
const field = (name) => place.querySelector(name);

/** Offers what all these models can be told, and keeps what was chosen where it still can be. */
export function offer(cards) {
  const [{ class_names = [], example_prompts = [] }] = cards;
  const num_classes = Math.min(...cards.map(({ num_classes = 0 }) => num_classes));
  const reads = cards.every(({ max_prompt_tokens }) => max_prompt_tokens);
  place.hidden = !reads && !num_classes;
  place.classList.toggle("reads", reads);
  if (reads) return offerPrompt(example_prompts);
  if (!num_classes) return place.replaceChildren();
  const chosen = field("select")?.value;
  const options = Array.from({ length: num_classes }, (_, number) => new Option(class_names[number] ?? number, number));
  const select = document.createElement("select");
  select.id = "class";
  select.append(new Option("Any", ""), ...options);
  show("Class ", select);
  if (chosen) choose(chosen);
}

function offerPrompt(examples) {
  const before = field("#prompt");
  const input = document.createElement("input");
  input.id = "prompt";
  input.type = "text";
  input.autocomplete = "off";
  input.value = before ? before.value : examples[0] ?? "";
  const list = document.createElement("datalist");
  list.id = "examples";
  list.append(...examples.map((example) => new Option(example)));
  show("Prompt ", input, list);
  input.setAttribute("list", list.id);
}

function show(text, ...fields) {
  const label = document.createElement("label");
  label.append(text, ...fields);
  place.replaceChildren(label);
}

/** Chooses a class; whether there is such a one. */
export function choose(label) {
  const option = [...(field("select")?.options ?? [])].find(({ value }) => value === label);
  if (option) option.selected = true;
  return Boolean(option);
}

/** Writes a prompt; whether it is read here. */
export function write(prompt) {
  const input = field("#prompt");
  if (input) input.value = prompt;
  return Boolean(input);
}

/** The fields of a request. */
export function request() {
  const prompt = field("#prompt")?.value;
  if (prompt !== undefined) return prompt ? { prompt } : {};
  const label = field("select")?.value;
  return label ? { class_label: Number(label) } : {};
}
