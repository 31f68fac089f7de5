"""Bridge: HTTP, and gRPC, in front of a daemon. A process of its own, on `AsyncClient`, without torch.

settings.py     what an operator chooses            addresses.py    addresses to listen on
http.py         requests, responses, errors         routes.py       which handler a path is for
app.py          an ASGI application                 statuses.py     errors as HTTP tells them
connections.py  connections within limits           server.py       a worker: the loop, the servers, its end
bridge.py       what the handlers share             interfaces.py   the interfaces, put together
browsers.py     which pages' requests are taken     questions.py    questions to daemons that are under way
first_wire.py   GET /health, POST /predict          oip/            Open Inference Protocol
grpc/           the same over gRPC
reports.py      GET /metrics, /stats, /models, ...  metrics.py      Prometheus text
openapi.py      the description of all routes       server_timing.py  a request's stages, in a header
page/           GET /, /docs: pages for people

It needs `pip install 'tensornext[http]'`, for gRPC `tensornext[http,grpc]`; everything here is imported by
`tnxctl bridge` alone.
"""
