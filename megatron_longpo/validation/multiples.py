"""The nearest sizes that would do, for the messages."""


def nearest_multiple(value: int, multiple: int) -> int:
    """The multiple nearest to a value, at least one; the greater of two that are as near."""
    return max((value + multiple // 2) // multiple, 1) * multiple


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of a number that is at most another one."""
    return max(divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)
