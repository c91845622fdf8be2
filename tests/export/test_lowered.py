"""Tables are named by what they hold."""

import torch

from difa_compile.export.lowered import TABLE, table_name


def test_equal_tables_have_one_name():
    table = torch.arange(6.0).reshape(2, 3)
    assert table_name(table) == table_name(table.clone().t().contiguous().t())
    others = (table + 1, table.reshape(3, 2), table.double(), table.to(torch.int32).view(torch.float32))
    names = {table_name(each) for each in (table, *others)}
    assert len(names) == 5
    assert all(name.startswith(TABLE) for name in names)
