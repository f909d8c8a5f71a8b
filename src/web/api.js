// The server's API, its failures as sentences, and the key, which is kept here and nowhere else.

let key = "";

export function useKey(value) {
  key = value.trim();
}

/** Whether there is one. */
export const keyed = () => key !== "";

/** What went wrong, in words for people; `status` is 0 where there was no answer. */
export class Problem extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

const unreachable = () =>
  new Problem(`The server at ${location.host} cannot be reached. See that it is running, then try again.`);
const cutShort = () =>
  new Problem(`The server at ${location.host} broke off before the images were finished. See that it is running, then try again.`);

/** The response to a GET, or to a POST where there is a body. Throws a `Problem` unless it is a success. */
export async function ask(path, body, signal) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const request = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const response = await fetch(path, request).catch((error) => {
    throw signal?.aborted ? error : unreachable();
  });
  if (response.ok) return response;
  const reply = await response.json().catch(() => ({}));
  throw new Problem(sentence(reply.error?.message ?? `The server answered ${response.status}`), response.status);
}

/** The events of a streamed request, each as its parsed data. An error event is thrown. */
export async function* stream(path, body, signal) {
  const response = await ask(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal?.aborted ? error : cutShort();
    });
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:"));
      if (!data.length) continue; // a comment that keeps the connection open
      const event = JSON.parse(data.map((line) => line.slice(5)).join("\n"));
      if (event.error) throw new Problem(sentence(event.error.message));
      yield event;
    }
  }
}

/** The events of a streamed request, which must end with one that `isLast` recognises. */
export async function* whole(events, isLast) {
  for await (const event of events) {
    yield event;
    if (isLast(event)) return;
  }
  throw cutShort();
}

function sentence(message) {
  return message.charAt(0).toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}
