// Renews what is live, in place: the page stands without this.
"use strict";
const live = document.querySelector("[data-live]");
if (live) {
  setInterval(async () => {
    if (document.hidden || live.contains(document.activeElement)) return;
    try {
      const answer = await fetch(live.dataset.live);
      if (answer.ok) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        live.replaceChildren(...page.body.childNodes);
      }
    } catch {
      // The server is away; the next round tries again.
    }
  }, 2000);
}
if (document.querySelector("[data-again]")) setTimeout(() => location.reload(), 1000);
