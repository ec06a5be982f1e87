"""From an answer on the chat page to a row that waits for review."""

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.shortcuts import redirect
from django.utils.translation import gettext as _
from django.views.decorators.http import require_POST

from chat.models import Message
from portal.access import get_visible
from portal.page import reason
from tuning.datasets.collecting import collect_answer


@require_POST
def collect(request):
    """Proposes the answer `message` as a row of the user's collection: as it is, or as `response`
    says that it should have been.
    """
    answer = get_visible(Message.objects, request.user, pk=request.POST.get("message"))
    try:
        example = collect_answer(request.user, answer, response=request.POST.get("response"))
    except ValidationError as error:
        messages.error(request, reason(error))
    else:
        told = _("The answer waits for review in the dataset “%(name)s”.")
        messages.success(request, told % {"name": example.dataset.name})
    return redirect("conversation", pk=answer.conversation_id)
