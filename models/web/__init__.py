"""The web: Starlette endpoints, authentication, middleware, error responses, and the chat socket.

It imports the protocols, the interface of generation, users, store, ops and the ground; it loads no torch.
Start reading at the routes in server.py: each names its endpoint here. What is shared lies on `app.state`.
"""
