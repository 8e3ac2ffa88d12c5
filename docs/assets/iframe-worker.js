// Search for pages that are opened as files: browsers start no workers there, so the search runs in a hidden frame.
// MkDocs Material's offline plugin would load a script of this name from a network.
if (location.protocol === "file:") {
  const load = (frame, url) =>
    new Promise((resolve, reject) => {
      const script = frame.document.createElement("script");
      script.src = new URL(url, document.baseURI);
      script.onload = resolve;
      script.onerror = reject;
      frame.document.body.appendChild(script);
    });
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const element = document.createElement("iframe");
      element.hidden = true;
      document.body.appendChild(element);
      this.frame = element.contentWindow;
      this.frame.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.frame.importScripts = (...urls) =>
        urls.reduce((loaded, next) => loaded.then(() => load(this.frame, next)), Promise.resolve());
      this.loaded = load(this.frame, url);
    }
    postMessage(data) {
      this.loaded.then(() => this.frame.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {}
  };
}
