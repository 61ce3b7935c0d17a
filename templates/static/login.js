const RELOADED = 'parley.reloaded';

/** The session has ended, so a reload shows the login form. If it shows the chat, another reload would not help. */
export function logInAgain() {
  if (sessionStorage.getItem(RELOADED)) return;
  sessionStorage.setItem(RELOADED, 'yes');
  location.reload();
}

export function loggedIn() {
  sessionStorage.removeItem(RELOADED);
}
