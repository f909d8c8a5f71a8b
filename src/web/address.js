// The state of a comparison as the page's address: what a link restores.

/** What the address asks for; lists are empty and values undefined where it does not say. */
export function read() {
  const query = new URLSearchParams(location.search);
  const list = (name) => query.get(name)?.split(",") ?? [];
  const value = (name) => query.get(name) ?? undefined;
  return {
    models: list("models"),
    steps: list("steps"),
    samplers: list("samplers"),
    label: value("class"),
    prompt: value("prompt"),
    seed: value("seed"),
    count: value("n"),
    view: value("view"),
  };
}

/** The address of a request to `/v1/compare` or `/v1/images/generations`, seen in a view. */
export function of({ model, models, num_inference_steps, scheduler, class_label, prompt, seed, n }, view) {
  const fields = {
    models: model ?? models,
    steps: num_inference_steps,
    samplers: scheduler,
    class: class_label,
    prompt,
    seed,
    n,
    view: view === "beside" ? undefined : view,
  };
  const told = Object.entries(fields).filter(([, value]) => value !== undefined);
  // A comma needs no escape in a query, and is easier to read without one.
  const query = new URLSearchParams(told).toString().replaceAll("%2C", ",");
  return `${location.origin}/?${query}`;
}

/** Puts it into the browser's address bar; the part of the page that is seen stays. */
export function write(address) {
  history.replaceState(null, "", address + location.hash);
}
