fn shuffle(x: Group, distance: u32) -> Group {
    return Group(subgroupShuffleXor(x.lower, distance), subgroupShuffleXor(x.upper, distance));
}
