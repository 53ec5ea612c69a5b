// Searches captions, keys and prompts of this page; on the first page of many, the captions of all pages.
"use strict";
(() => {
  const box = document.getElementById("search");
  if (!box) return;
  const said = document.getElementById("search-said"), list = document.getElementById("search-found");
  const fold = text => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const textOf = (element, which) => fold([...element.querySelectorAll(which)].map(one => one.textContent).join(" "));
  const images = [...document.querySelectorAll(".images > li")].map(element => ({
    element, text: textOf(element, ".caption, .more li, .key"),
  }));
  const sections = [...document.querySelectorAll("section.result")].map(element => ({
    element, text: textOf(element, "h2, .about .caption, .about details li"),
    images: images.filter(image => element.contains(image.element)),
  }));
  const contents = [...document.querySelectorAll(".contents li")].map(element => ({element, text: fold(element.textContent)}));
  const stored = document.getElementById("captions");
  const elsewhere = stored ? JSON.parse(stored.textContent) : null;
  const captions = elsewhere ? elsewhere.captions.map(([caption, queries]) => ({caption, queries, text: fold(caption)})) : [];
  const number = count => count.toLocaleString("en");
  const most = 50;

  const foundElsewhere = has => {
    const found = captions.filter(one => has(one.text));
    list.replaceChildren(...found.slice(0, most).map(one => {
      const item = document.createElement("li"), caption = document.createElement("span");
      caption.textContent = one.caption;
      caption.dir = "auto";
      item.append(caption);
      for (const query of one.queries.slice(0, 20)) {
        const link = document.createElement("a");
        link.href = "report/" + elsewhere.pages[query - 1] + "#query-" + query;
        link.textContent = "#" + number(query);
        item.append(" ", link);
      }
      if (one.queries.length > 20) item.append(" …");
      return item;
    }));
    return found.length;
  };

  const search = () => {
    const words = fold(box.value).split(/\s+/).filter(Boolean);
    const has = text => words.every(word => text.includes(word));
    for (const image of images) image.element.hidden = !has(image.text);
    const shown = new Set();
    for (const section of sections) {
      const own = has(section.text);
      if (own) for (const image of section.images) image.element.hidden = false;
      section.element.hidden = !own && section.images.every(image => image.element.hidden);
      if (!section.element.hidden) shown.add(section.element.id);
      const least = section.element.querySelector("details.least");
      if (least) least.open = words.length > 0 && !own && [...least.querySelectorAll(".images > li")].some(one => !one.hidden);
    }
    let prompts = 0;
    for (const one of contents) {
      const aim = one.element.querySelector("a").getAttribute("href");
      one.element.hidden = aim.startsWith("#") ? !shown.has(aim.slice(1)) : !has(one.text);
      if (!one.element.hidden) prompts += 1;
    }
    list.replaceChildren();
    if (!words.length) said.textContent = "";
    else if (elsewhere) {
      const found = foundElsewhere(has);
      said.textContent = number(prompts) + " of the prompts below; " + number(found) + " captions of training images"
        + (found > most ? ", the first " + most + " here" : "") + (found ? ", with the numbers of the pages’ entries that show them." : ".");
    } else {
      const hits = images.filter(image => !image.element.hidden).length;
      said.textContent = number(hits) + " of " + number(images.length) + " images shown, in " + number(shown.size) + " of "
        + number(sections.length) + " entries.";
    }
  };
  box.addEventListener("input", search);
  box.closest(".search").hidden = false;
})();
