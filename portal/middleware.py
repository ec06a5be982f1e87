"""What holds for every response."""

from asgiref.sync import iscoroutinefunction
from django.http import HttpResponse
from django.utils.decorators import sync_and_async_middleware


@sync_and_async_middleware
def head_without_body(get_response):
    """A HEAD's response ends with its headers. Django leaves that to the server, which would
    run a stream or a download to its end for nobody."""
    if iscoroutinefunction(get_response):

        async def async_middleware(request):
            return _without_body(request, await get_response(request))

        return async_middleware

    def middleware(request):
        return _without_body(request, get_response(request))

    return middleware


def _without_body(request, response):
    if request.method != "HEAD":
        return response
    bare = HttpResponse(
        status=response.status_code, reason=response.reason_phrase, headers=dict(response.items())
    )
    bare.cookies = response.cookies
    response.close()  # a file that would have been sent
    return bare
