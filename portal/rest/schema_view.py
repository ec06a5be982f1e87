"""GET /api/schema/: anybody may ask for it, so it is made once for each language and form."""

from typing import ClassVar

from django.http import HttpResponse
from django.utils.translation import get_language
from drf_spectacular.utils import extend_schema
from drf_spectacular.views import SpectacularAPIView


class SchemaView(SpectacularAPIView):
    """Making it and writing it as YAML takes half a second, in which no page is answered."""

    http_method_names = ["get", "head"]
    made: ClassVar[dict[tuple[str, str], HttpResponse]] = {}

    @extend_schema(exclude=True)
    def get(self, request, *_arguments, **_names):
        """The parameters `lang` and `version` of drf-spectacular mean nothing here: there is one
        schema.
        """
        key = (get_language(), request.accepted_renderer.format)
        if key in self.made:
            known = self.made[key]
            return HttpResponse(known.content, content_type=known["Content-Type"])
        response = self._get_schema_response(request)
        response.add_post_render_callback(lambda made: self.made.setdefault(key, made))
        return response
