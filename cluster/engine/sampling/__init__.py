"""Drawing tokens. Every row's result depends on that row alone, with the same bits in any batch."""
