"""The web: Starlette endpoints, authentication, middleware, error responses, the chat socket, limits for strangers.

It imports protocols, users, store, ops and the ground; it loads no torch.
Start reading at the routes in server.py: each names its endpoint here. `app.state` has what requests share.
"""
