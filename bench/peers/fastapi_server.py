"""FastAPI on uvicorn, with uvloop and httptools.

    json  what most people write first: a pydantic model of nested lists in, nested lists out
    raw   the bytes of the array both ways

There is no batching in it. The forward runs on the event loop: for one so short, FastAPI's thread pool costs more.
"""
# mypy: disable-error-code="import-not-found,import-untyped,misc,untyped-decorator"

from __future__ import annotations

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

import serving

app = FastAPI()
run = serving.forward()


class Rows(BaseModel):
    """Body of a request: the rows of the input."""

    input: list[list[float]]


async def predict_json(rows: Rows) -> dict[str, list[list[float]]]:
    output: list[list[float]] = run(np.array(rows.input, np.float32)).tolist()
    return {"output": output}


async def predict_raw(request: Request) -> Response:
    output = run(serving.parse(await request.body()))
    return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    configuration, port, _ = serving.arguments()
    serving.end_with_stdin()
    app.post("/predict")(predict_json if configuration == "json" else predict_raw)
    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False, log_level="error")


if __name__ == "__main__":
    main()
