/** The place of the sidebar on small screens: a dialog, so that the page behind it is inert. */
export class Drawer {
  constructor() {
    for (const id of ['drawer', 'sidebar']) this[id] = document.getElementById(id);
    this.narrow = matchMedia('(max-width: 52rem)');
    this.narrow.addEventListener('change', () => this.arrange());
    this.drawer.addEventListener('click', (event) => event.target === this.drawer && this.close());
    document.getElementById('open-drawer').addEventListener('click', () => this.drawer.showModal());
    document.getElementById('close-drawer').addEventListener('click', () => this.close());
    this.arrange();
  }

  arrange() {
    this.close();
    if (this.narrow.matches) this.drawer.append(this.sidebar);
    else document.body.prepend(this.sidebar);
  }

  close() {
    this.drawer.close();
  }
}
