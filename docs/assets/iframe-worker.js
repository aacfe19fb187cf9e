// Lets search work in pages that are opened as files: browsers start no worker there.
// A hidden frame runs the worker's script, and messages pass between frame and page.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inner = frame.contentWindow
      this.waiting = []
      this.inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      // Scripts load one after the other, each when the one before has run.
      this.inner.importScripts = (...urls) =>
        urls.reduce((before, each) => before.then(() => this.load(new URL(each, url))), Promise.resolve())
      this.load(url).then(() => {
        this.loaded = true
        for (const data of this.waiting) this.postMessage(data)
      })
    }

    load(url) {
      return new Promise((done, failed) => {
        const script = this.inner.document.createElement("script")
        Object.assign(script, { src: url, onload: done, onerror: failed })
        this.inner.document.head.appendChild(script)
      })
    }

    postMessage(data) {
      if (this.loaded) this.inner.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }

    terminate() {}
  }
}
