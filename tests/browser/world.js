// What a check has: a server, pages whose errors and requests are watched, a place for screenshots.

import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

import { launch, start } from "./server.js";

const AXE = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export class World {
  /** `base` is the address of a server with a pair of models, which the checks share. */
  constructor({ browser, program, folders, shots, base }) {
    Object.assign(this, { browser, program, folders, shots, base });
    this.contexts = [];
    this.servers = [];
    this.errors = [];
    this.outside = [];
    /** What the browser itself logs of replies that are refusals, or of servers that are gone. */
    this.expected = undefined;
  }

  /** A server of this check's own. */
  async start(models, ...flags) {
    const server = await start(this.program, this.folders[models], ...flags);
    this.servers.push(server);
    return server;
  }

  /** A server of this check's own, whose models are still on their way. */
  async launch(models, environment, ...flags) {
    const server = await launch(this.program, this.folders[models], environment, ...flags);
    this.servers.push(server);
    return server;
  }

  /** A page that is ready to be used, after the first visit's run. */
  async open({ base = this.base, path = "/", width = 1280, height = 900, ready = true, prepare, ...options } = {}) {
    const context = await this.browser.newContext({ viewport: { width, height }, ...options });
    this.contexts.push(context);
    const page = await context.newPage();
    page.setDefaultTimeout(20_000);
    page.on("pageerror", (error) => this.errors.push(error.stack));
    page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) this.errors.push(message.text());
    });
    page.on("request", (request) => {
      const { protocol, origin } = new URL(request.url());
      if (protocol !== "data:" && origin !== base) this.outside.push(request.url());
    });
    await prepare?.(page);
    await page.goto(base + path);
    if (ready) {
      await page.locator("#fields:enabled").waitFor({ state: "attached" });
      await page.locator("#run").filter({ hasText: /Compare|Draw/ }).waitFor({ state: "attached" });
    }
    return page;
  }

  async shot(page, name) {
    if (!this.shots) return;
    await page.mouse.move(0, 0);
    await page.screenshot({ path: join(this.shots, `${name}.png`), fullPage: true });
  }

  /** What axe-core finds at fault, with every rule that it has. */
  async faults(page) {
    await page.evaluate(AXE);
    const { violations, passes } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"], rules: { "color-contrast-enhanced": { enabled: false } } }));
    assert(passes.length > 20, `axe-core looked at ${passes.length} rules only`);
    return violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html, failureSummary }) => `${html} (${failureSummary})`).join("; ")}`);
  }

  /** The contrast of every visible text with what is behind it: `{ratio, large, text}`. */
  async contrasts(page) {
    return page.evaluate(() => {
      const channels = (color) => color.match(/[\d.]+/g).map(Number);
      const luminance = (color) => {
        const [r, g, b] = channels(color).map((value) => value / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
          const color = getComputedStyle(at).backgroundColor;
          if ((channels(color)[3] ?? 1) === 1) return color;
        }
        return "rgb(255, 255, 255)";
      };
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      const results = [];
      while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("template, option, .hidden, noscript")) continue;
        const style = getComputedStyle(element);
        const [a, b] = [luminance(style.color), luminance(behind(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        results.push({ ratio, large: parseFloat(style.fontSize) >= 24, text: walker.currentNode.data.trim() });
      }
      return results;
    });
  }

  /** Nothing was logged as an error, and nothing asked of any other host. */
  quiet() {
    const unexpected = this.errors.filter((error) => !this.expected?.test(error));
    assert.deepEqual(unexpected, [], "errors in the console");
    assert.deepEqual(this.outside, [], "requests to other hosts");
  }

  async close() {
    for (const context of this.contexts) await context.close();
    for (const server of this.servers) await server.kill();
  }
}
