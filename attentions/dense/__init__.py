"""Every query reads every visible key: softmax attention, its relatives, and the floors."""
