"""The web: Starlette endpoints, authentication, middleware, error responses, and the chat socket.

It imports protocols, users, store, ops and the ground; it loads no torch.
Start reading at the routes in server.py: each names its endpoint here. `app.state` has what requests share.
"""
