"""Prompts of the speculation benchmark. The first ask for what they hold; the others do not."""

_CODE = '''\
class Account:
    """Money of one customer, in cents."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("the balance is too low")
        self.balance -= amount
        self.history.append(("withdraw", amount))

    def transfer(self, other, amount):
        self.withdraw(amount)
        other.deposit(amount)
        self.history.append(("transfer", amount))
'''
_LETTER = """\
Dear neighbours,

The water in our street will be turned off on Tuesday, 14 March, from nine in the morning until about three in the
afternoon, because the main pipe below number 27 has to be replaced. Please fill a few bottles the evening before,
and close all taps. If you depend on running water for medical reasons, call the waterworks under 555 0142 and they
will bring a tank to your house. The parking places in front of numbers 21 to 33 cannot be used on that day.

Kind regards,
Martha Jensen
"""

COPY_PROMPTS = (
    f"This is the file account.py:\n\n```python\n{_CODE}```\n\nThe same file again:\n\n```python\n",
    f"The letter:\n\n{_LETTER}\nA copy of the letter:\n\n",
)
RANDOM_PROMPTS = (
    "Once upon a time in a small town by the sea,",
    "The old lighthouse keeper opened the door and saw",
)
