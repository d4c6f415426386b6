// What the page does in the browser itself: dialogues kept there, files saved and read, texts copied as they are.
// Dialogues are kept one by one: gradio's BrowserState holds a list of all in each tab, and the tab that writes last
// would drop those of the others.
const dreamer = {
  prefix: "dreamer-dialogue-",
  most: 50,

  stored() {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(this.prefix));
    const found = names.map((name) => { try { return JSON.parse(localStorage.getItem(name)); } catch { return null; } });
    return found.filter((one) => one && one.id).sort((one, other) => other.time - one.time);
  },

  // keep a dialogue, or forget it once it has no turns; what is kept, newest first, as [[title, id], …]
  keep(text) {
    if (text) {
      const kept = JSON.parse(text);
      if (!kept.turns.length) localStorage.removeItem(this.prefix + kept.id);
      else {
        const value = JSON.stringify({...kept, time: Date.now()});
        for (;;) {
          try { localStorage.setItem(this.prefix + kept.id, value); break; } catch {
            const oldest = this.stored().filter((one) => one.id !== kept.id).pop();
            if (!oldest) break;
            localStorage.removeItem(this.prefix + oldest.id);
          }
        }
      }
      sessionStorage.setItem(this.prefix, kept.id);
      for (const old of this.stored().slice(this.most)) localStorage.removeItem(this.prefix + old.id);
    }
    return JSON.stringify(this.stored().map((one) => [one.title, one.id]));
  },

  dialogue(id) { return localStorage.getItem(this.prefix + id) || ""; },

  open(id) {
    sessionStorage.setItem(this.prefix, id);
    return this.dialogue(id);
  },

  // the dialogue of this tab before it was refreshed; in a new tab the newest
  last() {
    const id = sessionStorage.getItem(this.prefix), first = this.stored()[0];
    return id !== null ? this.dialogue(id) : first ? JSON.stringify(first) : "";
  },

  save(text, name) {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  },

  load: () => new Promise((resolve) => {
    const input = document.createElement("input");
    input.type = "file";
    input.accept = ".json,.jsonl";
    input.onchange = async () => resolve(await input.files[0].text());
    input.oncancel = () => resolve("");
    input.click();
  }),

  // gradio's names for which it has no translation; a message's name has its text, as it was typed
  chinese: [
    [/^Copy conversation$/, "复制对话"], [/^Copy( message)?$/, "复制"], [/^Copied( message| conversation)?$/, "已复制"],
    [/^Reset to default value$/, "恢复默认值"], [/^number input for (.*)$/, "$1（数值）"], [/^range slider for (.*)$/, "$1（滑块）"], [/^undo$/, "撤销"],
    [/^chatbot conversation$/, "对话"], [/^More tabs$/, "更多标签页"], [/^Vega visualization$/, "曲线图"],
    [/^Liked$/, "已赞"], [/^Disliked$/, "已踩"], [/^Info $/, "提示"], [/^Warning $/, "注意"], [/^Error $/, "出错"], [/^Close$/, "关闭"],
    [/^Gradio footer navigation$/, "页脚"], [/^user's message: (.*)$/s, "问题：$1"], [/^bot's message: (.*)$/s, "回答：$1"],
  ],

  named(text) {
    const pairs = document.documentElement.lang.startsWith("zh") ? this.chinese : [];
    return pairs.reduce((found, [english, chinese]) => found.replace(english, chinese), this.typed(text));
  },

  rename(part) {
    for (const name of ["aria-label", "title"]) {
      const old = part.getAttribute(name), found = old && this.named(old);
      if (found !== old) part.setAttribute(name, found);
    }
    if (part.matches(".toast-title")) part.firstChild.data = this.named(part.firstChild.data);
  },

  // undoes utils/chat/markdown.py
  typed: (text) => text.replace(/\n\n<small class="by">.*?<\/small>/g, "")
    .replace(/&#0(\d+);/g, (_, code) => String.fromCharCode(code)),
};

new MutationObserver((changes) => changes.forEach(({type, target, addedNodes}) => {
  if (type === "attributes") dreamer.rename(target);
  for (const part of addedNodes) {
    if (part.nodeType === 1) [part, ...part.querySelectorAll("[aria-label], [title], .toast-title")].forEach((one) => dreamer.rename(one));
  }
})).observe(document.documentElement, {subtree: true, childList: true, attributeFilter: ["aria-label", "title"]});
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) => write(dreamer.typed(text));
}
document.addEventListener("focusin", ({target}) => {
  if (!target.matches("#chat textarea")) return;
  target.value = dreamer.typed(target.value);
  target.dispatchEvent(new Event("input", {bubbles: true}));
});
document.addEventListener("keydown", (event) => {
  if (!event.target.matches("#chat textarea") || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.closest(".message-row").nextElementSibling?.querySelector("button")?.click();  // submit
});
