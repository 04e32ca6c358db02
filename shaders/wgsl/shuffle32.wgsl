fn shuffle(x: Group, distance: u32) -> Group {
    return subgroupShuffleXor(x, distance);
}
