// The conversations of this user over HTTP. Failed requests throw ApiError, or another error without a network.

import { logInAgain } from './login.js';

const CONVERSATIONS = 'v1/conversations'; // relative, since the app may be under a path

export class ApiError extends Error {
  constructor(status, { code, message }) {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function request(path, options) {
  const response = await fetch(path, { headers: { Accept: 'application/json' }, ...options });
  if (response.status === 401) logInAgain();
  if (response.ok) return response.json();
  const answer = await response.json().catch(() => ({}));
  throw new ApiError(response.status, answer.error ?? { message: response.statusText });
}

const address = (id) => `${CONVERSATIONS}/${encodeURIComponent(id)}`;

export function listConversations(parameters) {
  return request(`${CONVERSATIONS}?${new URLSearchParams(parameters)}`);
}

/** A conversation with the last messages of its current branch, or with those before another one. */
export function getBranch(id, parameters = {}) {
  return request(`${address(id)}/branch?${new URLSearchParams(parameters)}`);
}

/** Changes the title of a conversation, or shows another branch: the one that a message, its `leaf`, is on. */
export function changeConversation(id, change) {
  const headers = { 'Content-Type': 'application/json' };
  return request(address(id), { method: 'POST', headers, body: JSON.stringify(change) });
}

export function deleteConversation(id) {
  return request(address(id), { method: 'DELETE' });
}

export function exportAddress(id, format) {
  return `${address(id)}/export?format=${format}`;
}
