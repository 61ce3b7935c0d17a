"""OpenAI's Responses API, over HTTP and over WebSockets: the main protocol.

It imports what `protocols` may import. Start reading at request.py, which is what clients ask for; then events.py and
resource.py, which are what they get; session.py is a socket. Its page is ../README.md.
"""
