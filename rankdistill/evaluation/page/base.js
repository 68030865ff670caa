"use strict";
// The choice of light, dark or the system's own; remembered where the browser allows it.
(() => {
  const button = document.getElementById("theme");
  if (!button) return;
  const order = ["system", "light", "dark"];
  const key = "rankdistill-theme";
  let chosen = "system";
  try {
    const kept = localStorage.getItem(key);
    if (order.includes(kept)) chosen = kept;
  } catch { /* no storage here: the choice holds until the page is closed */ }
  const show = () => {
    if (chosen === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    button.textContent = `Theme: ${chosen}`;
  };
  button.addEventListener("click", () => {
    chosen = order[(order.indexOf(chosen) + 1) % order.length];
    try { localStorage.setItem(key, chosen); } catch { /* as above */ }
    show();
  });
  show();
})();
