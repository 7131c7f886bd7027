from service import BOX_SIZE


def test_a_box_holds_two_orders() -> None:
    assert BOX_SIZE == 2
