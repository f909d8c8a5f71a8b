// A comparison as something to paste: its address, a curl command, a Python program.

const byId = (id) => document.getElementById(id);

/** The path that a request is sent to. */
export const path = ({ models }) => (models ? "/v1/compare" : "/v1/images/generations");

/** A request as a command for a shell. The key, where one is asked for, comes from the environment. */
export function curl(request, keyed) {
  const key = keyed ? ` \\\n  -H "Authorization: Bearer $UNDERSTUDY_API_KEY"` : "";
  const body = JSON.stringify(request).replaceAll("'", "'\\''");
  return `curl -s ${location.origin}${path(request)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${body}' -o images.json\n`;
}

/** A request as a program that needs Python alone, and writes the images as files. */
export function python(request, keyed) {
  // What is in a request is written the same in JSON and in Python.
  const fields = Object.entries(request).map(([name, value]) => `    ${JSON.stringify(name)}: ${JSON.stringify(value)},\n`).join("");
  const headers = `{"Content-Type": "application/json"${keyed ? `, "Authorization": "Bearer " + os.environ["UNDERSTUDY_API_KEY"]` : ""}}`;
  const pair = Boolean(request.models);
  return `import base64, json${keyed ? ", os" : ""}, urllib.request

body = {
${fields}}
headers = ${headers}
url = "${location.origin}${path(request)}"
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
reply = json.load(urllib.request.urlopen(request))
${pair ? `print("speed-up by device time:", reply["speedup"]["device"])\n` : ""}for side in ${pair ? `reply["pair"]` : "[reply]"}:
    for image in side["data"]:
        with open(f"{side['model']}-{image['seed']}.png", "wb") as file:
            file.write(base64.b64decode(image["b64_json"]))
`;
}

/** Copies a text and shows it; where the browser lets no page copy, it is selected instead. */
export async function copy(text, what) {
  const shown = byId("snippet");
  shown.textContent = text;
  shown.hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    byId("copied").textContent = `${what} copied.`;
  } catch {
    // Browsers keep the clipboard from pages that come over plain HTTP from another machine.
    getSelection().selectAllChildren(shown);
    byId("copied").textContent = `This browser does not let the page copy. ${what} is selected below: press Ctrl+C.`;
  }
}
