"use strict";
(() => {
  const search = document.querySelector("#example-search");
  const examples = [...document.querySelectorAll(".example")];
  if (search) {
    search.hidden = false;
    search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      for (const example of examples) example.hidden = wanted !== "" && !example.textContent.toLowerCase().includes(wanted);
    });
  }
  // j and k walk through the examples that the filter shows.
  document.addEventListener("keydown", (event) => {
    if (!["j", "k"].includes(event.key) || event.target === search || event.ctrlKey || event.metaKey || event.altKey) return;
    const visible = examples.filter((example) => example.offsetParent !== null);
    if (visible.length === 0) return;
    const open = visible.findIndex((example) => example.open);
    const next = Math.min(visible.length - 1, Math.max(0, open + (event.key === "j" ? 1 : -1)));
    visible[next].open = true;
    visible[next].querySelector("summary").focus();
    visible[next].scrollIntoView({ block: "nearest" });
  });
})();
