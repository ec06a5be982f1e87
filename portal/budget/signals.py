"""What others may want to hear of the budget. Sent once the transaction is committed.

`nearly_spent(account, percent)`: NEARLY of a balance's valid units have been used; once until it
has more again. `limit_reached(run, account)`: a run is being stopped because its payer has nothing
left. `account` is a balance (portal.budget.models.Account): its `user` or its `team` is whose.
"""

from django.dispatch import Signal

NEARLY = 80  # percent

nearly_spent = Signal()
limit_reached = Signal()
