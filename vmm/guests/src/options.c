/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Words of the multiboot command line.
 */
#include "guest.h"

/* The text after `name` where it stands as a word of its own, or NULL. */
static const char *find(const struct multiboot_info *info, const char *name)
{
    const char *at = (info->flags & INFO_CMDLINE) ? (const char *)info->cmdline : "";

    while (*at) {
        const char *n = name;

        while (*n && *at == *n)
            at++, n++;
        if (!*n && (*at == '\0' || *at == ' ' || *at == '='))
            return at;
        while (*at && *at != ' ')
            at++;
        while (*at == ' ')
            at++;
    }
    return NULL;
}

int option_set(const struct multiboot_info *info, const char *name)
{
    return find(info, name) != NULL;
}

uint32_t option_number(const struct multiboot_info *info, const char *name, uint32_t otherwise)
{
    const char *at = find(info, name);
    uint32_t value = 0;

    if (!at || *at != '=' || at[1] < '0' || at[1] > '9')
        return otherwise;
    for (at++; *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (*at - '0');
    return value;
}
