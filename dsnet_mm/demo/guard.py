"""What the page lets in: requests of its own site, its routes, images and events.

Gradio itself answers any host, stores any file, fetches addresses, has routes of no use
here, and prints a traceback for an event that its page would not send.
"""

import html
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from uuid import uuid4

import gradio as gr
from gradio.routes import App, ORJSONResponse
from gradio.utils import get_upload_folder
from gradio_client.utils import is_valid_file, strip_invalid_filename_characters
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from .actions import MAX_BYTES, MAX_IMAGES, MAX_TOTAL, check_image

UPLOAD, JOIN = '/gradio_api/upload', '/gradio_api/queue/join'
ROUTES = {
    'POST': re.compile(f'{UPLOAD}|{JOIN}'),
    'GET': re.compile(
        r'/((config|theme\.css|favicon\.ico|manifest\.json)|(assets|static)/.+'
        r'|gradio_api/(app_id|info|startup-events|theme\.css|queue/data'
        r'|heartbeat/\w{1,64}|file=(?!https?:).+))?'
    ),
}
MAX_EVENT = 2**20
"""Bytes of a request to run an event: it has paths of images, not their content."""


class GuardedApp(App):
    """Gradio's application, which gets requests only after they are checked.

    Args:
        trusted: Names and addresses of the page, one of which a request must have as
            its host. A site whose name is made to lead here still has its own name.
    """

    def __init__(self, trusted: Iterable[str]) -> None:
        super().__init__(default_response_class=ORJSONResponse)
        self.trusted = {name.lower() for name in trusted}
        self.arriving = 0  # bytes of uploads that are not stored yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope['type'] != 'http':
            return await super().__call__(scope, receive, send)
        request, path = Request(scope, receive), scope['path']
        try:
            self.check_sender(request)
            if path == UPLOAD:
                paths = await self.upload(request)
                return await JSONResponse(paths)(scope, receive, send)
            if path == JOIN:
                self.check_size(request, MAX_EVENT)
                body = check_event(self.get_blocks(), await request.body())

                async def receive() -> dict:
                    return {'type': 'http.request', 'body': body}

        except ClientDisconnect:
            return None
        except (HTTPException, MultiPartException, ValueError, OSError) as error:
            text = sentence(getattr(error, 'detail', error))
            status = getattr(error, 'status_code', 400)
            # The page shows the text of a refused upload, and the detail of an event.
            response = PlainTextResponse(text, status)
            if path == JOIN:
                response = JSONResponse({'detail': text}, status)
            return await response(scope, receive, send)
        try:
            await super().__call__(scope, receive, send)
        except Exception as error:  # Gradio's, at a forged request: a line is enough
            text = f'{request.method} {path!r}: {type(error).__name__}: {error}'
            print(text, file=sys.stderr)

    def check_sender(self, request: Request) -> None:
        """Refuses other hosts, other sites, and routes that the page does not use."""
        headers, path = request.headers, request.scope['path']
        host = headers.get('host', '')
        name = urlsplit(f'//{host}').hostname
        if name not in self.trusted:
            raise HTTPException(
                403,
                f'{name} is no trusted host of this page; open the address that it has '
                f'printed, or start it with --trusted-host {name}',
            )
        origin = urlsplit(headers.get('origin', f'//{host}')).netloc
        own = headers.get('sec-fetch-site', 'none') in ('none', 'same-origin')
        linked = path == '/' and headers.get('sec-fetch-dest') == 'document'
        if origin.lower() != host.lower() or not (own or linked):
            raise HTTPException(403, 'requests from other sites are refused')
        routes = ROUTES.get(request.method.replace('HEAD', 'GET'))
        if routes is None or not routes.fullmatch(path):
            raise HTTPException(404, f'this page has no {request.method} {path:.60}')

    def check_size(self, request: Request, limit: int) -> int:
        """Returns the bytes of a request, if they find room."""
        length = request.headers.get('content-length', '')
        if not length.isdecimal() or int(length) > limit:
            raise HTTPException(413, f'a length of at most {limit:,} must be given')
        total = self.arriving + int(length)
        for folder, _, names in os.walk(get_upload_folder()):
            for name in names:
                with suppress(OSError):  # removed meanwhile
                    total += os.path.getsize(os.path.join(folder, name))
        if total > MAX_TOTAL:
            raise HTTPException(
                413,
                f'this page keeps at most {MAX_TOTAL:,} bytes; try again in an hour, '
                f'when these files are removed',
            )
        return int(length)

    async def upload(self, request: Request) -> list[str]:
        """Stores uploaded images, all or none. Returns their paths."""
        length = self.check_size(request, MAX_TOTAL)
        self.arriving += length
        try:
            async with request.form(max_files=MAX_IMAGES) as form:
                paths = await run_in_threadpool(store, form.getlist('files'))
        finally:
            self.arriving -= length
        self.get_blocks().upload_file_set.update(paths)  # Gradio removes old ones
        return paths


def store(files: list[UploadFile | str]) -> list[str]:
    """Stores uploaded images.

    Raises:
        ValueError: If one is no image or too large. Then none is stored.
    """
    if not files:
        raise ValueError('there is no file in the upload')
    folder, paths = Path(get_upload_folder(), uuid4().hex), []
    try:
        for number, file in enumerate(files):
            if isinstance(file, str) or file.size > MAX_BYTES:
                raise HTTPException(413, f'a file has at most {MAX_BYTES:,} bytes')
            name = strip_invalid_filename_characters(Path(file.filename or '').name)
            path = folder / str(number) / (name.strip('.') or 'image')
            path.parent.mkdir(parents=True)
            with path.open('wb') as out:
                shutil.copyfileobj(file.file, out)
            check_image(path)
            if not is_valid_file(path.name, ['image']):  # Gradio looks at the name
                path = path.rename(path.with_name(f'{path.name}.png'))
            paths.append(str(path))
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return paths


# ---------------------------------------------------------------------- events

Coordinate = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Click(BaseModel):
    """What the page uses of a click on an image or on a table."""

    index: tuple[Coordinate, Coordinate]
    row_value: list[int | float | str | None] = []


class Event(BaseModel, strict=True, extra='forbid'):
    """A request to run an event."""

    session_hash: str = Field(pattern=r'^\w{1,64}$')
    fn_index: int
    data: list
    trigger_id: int | None = None
    event_data: Any = None


def check_event(blocks: gr.Blocks, body: bytes) -> bytes:
    """Checks a request to run an event. Returns what is known of it.

    Raises:
        ValueError: If the page would not send it.
    """
    try:
        event = Event.model_validate_json(body)
        targets = blocks.fns[event.fn_index].targets
        if any(kind == 'select' for _, kind in targets):
            click = Click.model_validate(event.event_data).model_dump()
            event.event_data = {**click, 'value': None}
        else:
            event.event_data = None
    except (ValueError, KeyError):
        raise ValueError('this is no event of this page; reload it') from None
    return json.dumps(event.model_dump()).encode()


class LocalBlocks(gr.Blocks):
    """Blocks whose events get what their page sends, and no files but its uploads."""

    async def preprocess_data(self, block_fn: Any, inputs: list, *args: Any) -> list:
        """Checks the inputs of an event, as a client has sent them."""
        in_a_sentence(check_files)(inputs)
        try:
            return await super().preprocess_data(block_fn, inputs, *args)
        except Exception as error:  # those of Gradio's components are of any type
            text = 'This event does not fit the page; reload it.'
            raise gr.Error(text, print_exception=False) from error


def check_files(value: Any) -> None:
    """Checks all files in the inputs of an event.

    Gradio refuses paths that were not uploaded. But it downloads from an address in the
    place of a path, and some components decode images before an event runs.

    Raises:
        ValueError: If one was not uploaded, is no image, or is too large.
    """
    if isinstance(value, dict):
        if 'path' in value or 'url' in value:
            path = Path(str(value.get('path'))).resolve()
            # Gradio decodes an image in the address and leaves the path alone.
            inline = str(value.get('url')).startswith('data:')
            if inline or not path.is_relative_to(Path(get_upload_folder()).resolve()):
                raise ValueError(
                    'upload the image; paths and addresses are not opened.'
                )
            check_image(path)
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            check_files(part)


def sentence(error: object) -> str:
    """Returns the text of an error for the page, without the folder of the uploads."""
    text = re.sub(rf'{re.escape(get_upload_folder())}/(\w+/)*', '', str(error))
    return html.escape(text[:1].upper() + text[1:])


def in_a_sentence(function: Callable) -> Callable:
    """Shows the errors of users on the page."""

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except (ValueError, OSError, ImportError, RecursionError) as error:
            raise gr.Error(sentence(error), print_exception=False) from error

    return call
