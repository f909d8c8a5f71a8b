// What the images are to show, for models that can be told: a class by its number. A model that reads text
// has its field here as well.

const place = document.getElementById("condition");

/** Offers what a model can be told, and keeps what was chosen where it still can be. */
export function offer({ class_names = [], num_classes = 0 }) {
  const chosen = place.querySelector("select")?.value;
  place.hidden = !num_classes;
  if (!num_classes) return place.replaceChildren();
  const options = Array.from({ length: num_classes }, (_, number) => new Option(class_names[number] ?? number, number));
  const select = document.createElement("select");
  select.id = "class";
  select.append(new Option("Any", ""), ...options);
  const label = document.createElement("label");
  label.append("Class ", select);
  place.replaceChildren(label);
  if (chosen) choose(chosen);
}

/** Chooses a class; whether there is such a one. */
export function choose(label) {
  const option = [...(place.querySelector("select")?.options ?? [])].find(({ value }) => value === label);
  if (option) option.selected = true;
  return Boolean(option);
}

/** The fields of a request. */
export function request() {
  const label = place.querySelector("select")?.value;
  return label ? { class_label: Number(label) } : {};
}
