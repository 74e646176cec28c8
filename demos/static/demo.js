// <mm-player data-spec="{...}">: several videos of equal length under one control, in step; or pictures side by side.
// The first video leads; the others are set right when they are more than half a frame away.

const PLAY = '<svg viewBox="0 0 10 10" aria-hidden="true"><path d="M1.5 0.5 9.5 5 1.5 9.5z"/></svg>';
const PAUSE = '<svg viewBox="0 0 10 10" aria-hidden="true"><path d="M1 .5h3v9H1zM6 .5h3v9H6z"/></svg>';

class Player extends HTMLElement {
  connectedCallback() {
    if (this.childElementCount) return;
    const spec = (this.spec = JSON.parse(this.dataset.spec));
    this.still = spec.kind === "image";
    this.setAttribute("role", "group");
    this.setAttribute("aria-label", (this.still ? "Pictures of " : "Videos of ") + "“" + spec.prompt + "”");
    this.panels = spec.panels.map((panel, index) => this.panel(panel, index));
    const grid = element("div", "mm-grid");
    grid.style.setProperty("--count", Math.min(spec.panels.length, 2 + (spec.panels.length === 3)));
    grid.append(...this.panels.map((panel) => panel.figure));
    this.append(grid, this.still ? this.extras() : this.controls());
    // On a phone the form is above it, and long; the plan between them folds first.
    if (innerWidth < 900) setTimeout(() => this.scrollIntoView({ block: "start" }), 400);
    if (!this.still) {
      this.playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
      this.show(0);
      this.tick = this.tick.bind(this);
      this.handle = requestAnimationFrame(this.tick);
    }
  }

  disconnectedCallback() {
    cancelAnimationFrame(this.handle);
  }

  panel(panel, index) {
    const { spec } = this;
    const figure = element("figure", "mm-panel" + (index ? "" : " mm-dense"));
    const media = element(this.still ? "img" : "video", spec.pixelated ? "mm-pixelated" : "");
    media.style.aspectRatio = spec.width + " / " + spec.height;
    if (this.still) {
      media.alt = panel.name + ": “" + spec.prompt + "”";
    } else {
      media.muted = true;
      media.playsInline = true;
      media.preload = "auto";
      media.disablePictureInPicture = true;
      media.setAttribute("aria-label", panel.name + ": “" + spec.prompt + "”");
    }
    media.src = panel.src;
    const caption = element("figcaption");
    const name = element("b");
    name.textContent = panel.name;
    const line = element("span");
    line.textContent = panel.line;
    caption.append(name, line);
    figure.append(media, caption);
    return { figure, media, name, panel };
  }

  controls() {
    const bar = element("div", "mm-controls");
    this.button = element("button", "mm-play");
    this.button.type = "button";
    this.button.addEventListener("click", () => this.toggle());
    this.scrub = element("input", "mm-scrub");
    Object.assign(this.scrub, { type: "range", min: 0, max: this.spec.frames - 1, step: 1, value: 0 });
    this.scrub.setAttribute("aria-label", "Frame of all videos");
    this.scrub.addEventListener("input", () => {
      this.pause();
      this.show(Number(this.scrub.value));
    });
    this.count = element("output", "mm-count");
    this.speed = element("select", "mm-speed");
    this.speed.setAttribute("aria-label", "Speed");
    for (const rate of [0.25, 0.5, 1, 2]) {
      const option = element("option");
      option.value = rate;
      option.textContent = rate + "×";
      option.selected = rate === 1;
      this.speed.append(option);
    }
    this.speed.addEventListener("change", () => {
      for (const { media } of this.panels) media.playbackRate = Number(this.speed.value);
    });
    bar.append(this.button, this.scrub, this.count, this.speed, this.extras());
    this.addEventListener("keydown", (event) => {
      if (event.target.tagName === "SELECT" || event.target.tagName === "INPUT" && event.target.type === "checkbox") return;
      if (event.key === " " && event.target !== this.button) {
        this.toggle();
      } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
        this.pause();
        this.show(this.frame() + (event.key === "ArrowLeft" ? -1 : 1));
      } else if (event.key === "Home" || event.key === "End") {
        this.pause();
        this.show(event.key === "Home" ? 0 : this.spec.frames - 1);
      } else {
        return;
      }
      event.preventDefault();
    });
    return bar;
  }

  extras() {
    const label = element("label", "mm-differ");
    const box = element("input");
    box.type = "checkbox";
    box.addEventListener("change", () => this.differ(box.checked));
    label.append(box, "difference to dense");
    return label;
  }

  differ(on) {
    const at = this.still ? 0 : this.frame();
    for (const { media, name, panel } of this.panels) {
      if (!panel.difference) continue;
      media.src = on ? panel.difference : panel.src;
      name.textContent = on ? panel.name + " − dense" : panel.name;
      if (!this.still) {
        media.playbackRate = Number(this.speed.value);
        media.addEventListener("loadeddata", () => this.playing || this.show(at), { once: true });
      }
    }
  }

  toggle() {
    if (this.playing) this.pause();
    else this.playing = true;
  }

  pause() {
    this.playing = false;
    for (const { media } of this.panels) media.pause();
  }

  frame() {
    const { fps, frames } = this.spec;
    return Math.max(0, Math.min(frames - 1, Math.floor(this.panels[0].media.currentTime * fps + 0.01)));
  }

  // The middle of a frame: its border belongs to the one before as well.
  show(frame) {
    const { fps, frames } = this.spec;
    const at = Math.max(0, Math.min(frames - 1, frame));
    for (const { media } of this.panels) media.currentTime = (at + 0.5) / fps;
    this.label(at);
  }

  label(frame) {
    this.scrub.value = frame;
    this.scrub.setAttribute("aria-valuetext", "frame " + (frame + 1) + " of " + this.spec.frames);
    this.count.textContent = frame + 1 + " / " + this.spec.frames;
    const word = this.playing ? "Pause" : "Play";
    if (this.button.getAttribute("aria-label") !== word) {
      this.button.setAttribute("aria-label", word);
      this.button.innerHTML = this.playing ? PAUSE : PLAY;
    }
  }

  tick() {
    const videos = this.panels.map((panel) => panel.media);
    const [lead, ...others] = videos;
    const ready = videos.every((video) => video.readyState >= 2);
    if (this.playing && ready && this.offsetParent !== null) {
      if (lead.ended || lead.currentTime >= this.spec.frames / this.spec.fps - 0.01) {
        for (const video of videos) video.currentTime = 0;
      }
      for (const video of videos) if (video.paused) video.play().catch(() => this.pause());
      for (const video of others) {
        if (!video.seeking && Math.abs(video.currentTime - lead.currentTime) > 0.5 / this.spec.fps) {
          video.currentTime = lead.currentTime;
        }
      }
    } else if (!this.playing || this.offsetParent === null) {
      for (const video of videos) if (!video.paused) video.pause();
    }
    this.label(this.frame());
    this.handle = requestAnimationFrame(this.tick);
  }
}

function element(name, className) {
  const made = document.createElement(name);
  if (className) made.className = className;
  return made;
}

if (!customElements.get("mm-player")) customElements.define("mm-player", Player);
