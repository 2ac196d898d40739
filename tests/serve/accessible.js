// What of a page cannot be read, used or named: texts with too little contrast, controls without a name, small targets.
() => {
  const faults = [];
  const say = (what, at) => faults.push(`${what}: ${at.outerHTML ? at.outerHTML.slice(0, 90) : at}`);

  // Contrast of every text that is seen, by WCAG 2.2 AA.
  const linear = (share) => (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
  const luminance = ([red, green, blue]) =>
    0.2126 * linear(red / 255) + 0.7152 * linear(green / 255) + 0.0722 * linear(blue / 255);
  const parsed = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const ground = (at) => {
    for (; at; at = at.parentElement) {
      const found = parsed(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const at = texts.currentNode.parentElement;
    const isSeen = texts.currentNode.data.trim() && at.checkVisibility();
    if (!isSeen || at.closest(":disabled, .unseen, svg")) continue;
    const pair = [luminance(parsed(getComputedStyle(at).color)), luminance(ground(at))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) say(`contrast ${contrast.toFixed(2)}`, at);
  }

  // Names.
  const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
  for (const id of ids.filter((each, at) => ids.indexOf(each) !== at)) say("an id twice", id);
  const textOf = (id) => document.getElementById(id)?.textContent;
  for (const at of document.querySelectorAll("button, input, select, textarea, summary, [tabindex], dialog")) {
    const names = [at.getAttribute("aria-label"), ...[...(at.labels || [])].map((each) => each.textContent)];
    names.push(...(at.getAttribute("aria-labelledby") || "").split(" ").map(textOf));
    if (at.matches("button, summary")) names.push(at.textContent);
    if (at.checkVisibility() && !names.some((each) => each && each.trim())) say("no name", at);
  }
  for (const key of ["aria-labelledby", "aria-describedby", "for"]) {
    for (const at of document.querySelectorAll(`[${key}]`)) {
      for (const id of at.getAttribute(key).split(" ")) if (!document.getElementById(id)) say(`${key} leads nowhere`, at);
    }
  }
  for (const at of document.querySelectorAll("img:not([alt]), svg.plot:not([aria-label])")) say("no text instead", at);

  // Structure, and room for a finger or a pointer.
  if (!document.documentElement.lang || !document.title) say("no language or title", document.documentElement);
  for (const name of ["main", "h1"]) if (document.querySelectorAll(name).length !== 1) say("not one", name);
  for (const at of document.querySelectorAll("button, select, summary, input[type=text], textarea")) {
    const { width, height } = at.getBoundingClientRect();
    if (at.checkVisibility() && !at.closest(".unseen") && (width < 24 || height < 24)) say("smaller than 24 px", at);
  }
  return faults;
}
