// Exchanges the middle of the page by what the server shows now. Without this script the page is
// whole, and reloads by itself.
"use strict";

const INTERVAL_MS = 2000;
// A server that is slower than this is told as not reached.
const ANSWER_MS_MAX = 10000;
const live = document.getElementById("live");
let waits = false;

// Somebody who marks text to copy it would lose it.
function isMarking() {
  const selection = document.getSelection();
  return selection !== null && !selection.isCollapsed;
}

async function refresh() {
  if (waits || document.hidden || isMarking()) return;
  waits = true;
  try {
    const signal = AbortSignal.timeout(ANSWER_MS_MAX);
    const answer = await fetch(location.href, { cache: "no-store", signal });
    if (!answer.ok) throw new Error(`the server says ${answer.status}`);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const next = page.getElementById("main");
    for (const details of document.querySelectorAll("details[open][id]")) {
      next.querySelector(`#${details.id}`)?.setAttribute("open", "");
    }
    document.getElementById("main").replaceWith(next);
    document.title = page.title;
    live.textContent = "live";
    live.classList.remove("lost");
  } catch (error) {
    live.textContent = `not reached (${error.message}); what stands here is old`;
    live.classList.add("lost");
  } finally {
    waits = false;
  }
}

setInterval(refresh, INTERVAL_MS);
document.addEventListener("visibilitychange", refresh);
live.textContent = "live";
