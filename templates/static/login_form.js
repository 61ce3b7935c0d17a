// The login keeps the link to a conversation, which is in the fragment of the address: browsers hand it on from the
// form to the page after the login, and to the form that comes after a wrong secret.

const form = document.getElementById('login');

form.addEventListener('submit', () => {
  const url = new URL(form.action);
  url.hash = location.hash;
  form.action = url;
});
