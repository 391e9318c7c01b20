#![no_main]

marcot_fuzz::fuzz!(checkpoint);
