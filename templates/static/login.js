const RELOADED = 'parley.reloaded';

/** The session is gone, so / is the login form; were it the chat again, a second reload would not help. */
export function logInAgain() {
  if (sessionStorage.getItem(RELOADED)) return;
  sessionStorage.setItem(RELOADED, 'yes');
  location.reload();
}

export function loggedIn() {
  sessionStorage.removeItem(RELOADED);
}
