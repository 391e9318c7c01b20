#![no_main]

marcot_fuzz::fuzz!(config);
