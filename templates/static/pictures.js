import { button, element } from './elements.js';
import { say } from './words.js';

const TYPES = ['image/png', 'image/jpeg', 'image/webp', 'image/gif'];
const MOST = 4; // in one message
const SIDE = 1024; // pixels: models see no more
const QUALITY = .85;
const BYTES = 900_000; // of all data URLs, in a frame of 1 MiB

/** The pictures that go with the next message of each conversation. */
export class Pictures {
  constructor({ onChange, onError }) {
    Object.assign(this, { onChange, onError, urls: [], kept: new Map(), allowed: false });
    for (const id of ['pictures', 'picture-file', 'add-picture', 'composer']) this[id] = document.getElementById(id);
    const file = this['picture-file'];
    this['add-picture'].addEventListener('click', () => file.click());
    file.addEventListener('change', () => {
      this.add([...file.files]);
      file.value = '';
    });
    this.composer.addEventListener('paste', (event) => this.taken(event, event.clipboardData));
    this.composer.addEventListener('drop', (event) => this.taken(event, event.dataTransfer));
  }

  /** Whether the model reads pictures. */
  allow(allowed) {
    this.allowed = allowed;
    this['add-picture'].hidden = !allowed;
  }

  /** Shows the pictures for another conversation. */
  open(key) {
    this.kept.set(this.key, this.urls);
    this.key = key;
    this.show(this.kept.get(key) ?? []);
  }

  /** The pictures are for a conversation that has an id now. */
  named(key) {
    this.kept.delete(this.key);
    this.key = key;
  }

  /** Takes all pictures away, and returns them. */
  take() {
    const { urls } = this;
    this.show([]);
    return urls;
  }

  /** Puts pictures back that were not sent. */
  giveBack(urls, key) {
    if (!urls.length) return;
    if (key === this.key) this.show([...urls, ...this.urls]);
    else this.kept.set(key, [...urls, ...(this.kept.get(key) ?? [])]);
  }

  taken(event, { files }) {
    const pictures = [...files].filter(({ type }) => TYPES.includes(type));
    if (!this.allowed || !pictures.length) return;
    event.preventDefault();
    this.add(pictures);
  }

  async add(files) {
    const { key } = this;
    try {
      const urls = await Promise.all(files.map(shrunk));
      const all = [...(key === this.key ? this.urls : this.kept.get(key) ?? []), ...urls];
      const size = all.reduce((sum, url) => sum + url.length, 0);
      if (all.length > MOST || size > BYTES) return this.onError(say('too_many_pictures', { count: MOST }));
      if (key === this.key) this.show(all);
      else this.kept.set(key, all);
    } catch {
      this.onError(say('no_picture'));
    }
  }

  show(urls) {
    this.urls = urls;
    this.pictures.hidden = !urls.length;
    this.pictures.replaceChildren(...urls.map((url, index) => this.preview(url, index)));
    this.onChange();
  }

  preview(url, index) {
    const item = element('li', 'picture');
    item.append(pictureOf(url), button('remove', () => this.show(this.urls.filter((_, place) => place !== index))));
    return item;
  }
}

/** An element that shows a picture. */
export function pictureOf(url) {
  const picture = new Image();
  picture.src = url;
  picture.alt = say('picture');
  return picture;
}

/** A data URL of a file, as small as the model sees it. */
async function shrunk(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext('2d');
  context.fillStyle = 'white'; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL('image/jpeg', QUALITY);
}
