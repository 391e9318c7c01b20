#![no_main]

marcot_fuzz::fuzz!(donor_list);
