import { button, element } from './elements.js';
import { say } from './words.js';

/** The place of a message among its versions, with buttons that show the version before it and the one after it. */
export class Versions {
  constructor(onShow) {
    this.node = element('span', 'versions');
    this.node.setAttribute('role', 'group');
    this.older = button('older', () => onShow('older'));
    this.newer = button('newer', () => onShow('newer'));
    this.count = element('span', 'count');
    this.node.append(this.older, this.count, this.newer);
  }

  show(place) {
    this.place = place;
    this.count.textContent = `${place.number} / ${place.count}`;
    this.node.setAttribute('aria-label', this.label);
    this.older.disabled = !place.older;
    this.newer.disabled = !place.newer;
  }

  get label() {
    return say('version', this.place);
  }

  /** Where it is on the screen. */
  get top() {
    return this.node.getBoundingClientRect().top;
  }

  /** Focuses the button of a direction, or the other one at the end of the versions. */
  focus(direction) {
    const target = this[direction];
    (target.disabled ? this[direction === 'older' ? 'newer' : 'older'] : target).focus({ preventScroll: true });
  }
}
