// What must be true of every view, in light and in dark: axe-core finds nothing.

import assert from "node:assert/strict";

const REFUSED = /Failed to load resource: the server responded with a status of 4\d\d/;

const VIEWS = {
  result: {},
  overlay: { path: "/?view=over&steps=6,3" },
  phone: { width: 360, height: 640, deviceScaleFactor: 2, hasTouch: true, isMobile: true },
  vote: { path: "/#vote" },
  "vote-phone": { path: "/#vote", width: 360, height: 640, deviceScaleFactor: 2, hasTouch: true, isMobile: true },
};

export async function axe_finds_nothing_in_any_view(world) {
  const { base } = await world.start("pair");
  const said = [];
  for (const colorScheme of ["light", "dark"]) {
    for (const [name, options] of Object.entries(VIEWS)) {
      const page = await world.open({ base, colorScheme, reducedMotion: "reduce", ...options });
      if (name.startsWith("vote")) {
        await page.locator("#create:visible, .pick:enabled img").first().waitFor();
        if (await page.locator("#create").isVisible()) await page.click("#create");
        await page.locator(".pick:enabled img").nth(1).waitFor();
        said.push(...(await world.faults(page)));
        await page.locator(".pick").first().click();
        await page.locator("#question").filter({ hasText: /^You / }).waitFor();
        await page.locator("#standing").waitFor();
      } else {
        await page.click("#copy-python");
        await page.locator("#copied").filter({ hasText: /./ }).waitFor();
        await page.locator("#latency tr").nth(1).waitFor();
      }
      said.push(...(await world.faults(page)).map((fault) => `${name}, ${colorScheme}: ${fault}`));
      await page.locator("summary").click();
      said.push(...(await world.faults(page)).map((fault) => `${name} with key, ${colorScheme}: ${fault}`));
      await page.locator("summary").click();
      await world.shot(page, `${name}-${colorScheme}`);
    }
  }
  assert.deepEqual(said, []);
  return `${Object.keys(VIEWS).length} views, twice`;
}

export async function axe_finds_nothing_in_an_error(world) {
  world.expected = REFUSED;
  const server = await world.start("pair", "--max-images-per-request=4", "--api-key=correct-horse");
  for (const colorScheme of ["light", "dark"]) {
    const page = await world.open({ base: server.base, colorScheme, ready: false });
    await page.locator("#problem").filter({ hasText: "API key" }).waitFor();
    assert.deepEqual(await world.faults(page), []);
    await world.shot(page, `key-${colorScheme}`);
    await page.locator("#key").fill("correct-horse");
    await page.keyboard.press("Enter");
    await page.locator("#history td").first().waitFor({ state: "attached" });
    await page.selectOption("#count", "16");
    await page.click("#run");
    await page.locator("#problem").filter({ hasText: "16" }).waitFor();
    assert.deepEqual(await world.faults(page), []);
    await world.shot(page, `error-${colorScheme}`);
  }
}
